"""Kubernetes resources: what they look like, and what platforms make of ours."""
