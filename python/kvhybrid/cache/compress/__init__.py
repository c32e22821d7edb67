"""Compression: fewer tokens of old context, each head's and layer's own choice, at their own positions."""
