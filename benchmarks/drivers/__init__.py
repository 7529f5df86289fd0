"""Contenders: each file is a script as its users write them, with the scenarios that it can run."""
