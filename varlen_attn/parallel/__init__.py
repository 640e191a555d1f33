"""Sequence parallel: the packed rows of one batch on several ranks of torch.distributed."""
