"""Tests that other projects wrote, on enabled models: ``make test-peers``. None of theirs is part of this repository."""
