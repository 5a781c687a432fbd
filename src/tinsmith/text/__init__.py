"""From text to tokens and back: tokenizers, chat templates, and the tool calls that models write as text.

A leaf beside wire, for the doors that speak text. It uses transformers' tokenizers, imported when they are
first needed, and no torch.
"""
