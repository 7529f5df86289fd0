"""A run on a Ray cluster that this machine is no part of, reached by the job API and by shared storage."""
