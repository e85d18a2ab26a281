"""Hosts: where the method meets the libraries that users already prune with. One file or folder per host."""
