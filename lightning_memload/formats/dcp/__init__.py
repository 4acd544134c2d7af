"""Directories of ``torch.distributed.checkpoint``: what lies where."""
