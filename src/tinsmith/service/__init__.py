"""The control plane: tenancy, order, futures, checkpoints, lifetimes. No HTTP, no torch, no SQL."""
