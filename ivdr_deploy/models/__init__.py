"""The network: backbones, heads, and the one function that puts them together."""
