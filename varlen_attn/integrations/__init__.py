"""What knows other libraries. Nothing here is imported before a model of theirs is given; nothing is registered before it is enabled."""
