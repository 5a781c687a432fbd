"""Tinker's types and codecs: JSON and protobuf. numpy, protobuf and zstandard only."""
