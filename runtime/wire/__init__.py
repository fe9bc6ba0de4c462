"""Ranks talk: groups, agreement, collectives on real tensors."""
