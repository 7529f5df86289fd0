"""Training on a Ray cluster that is elsewhere: sent by its job API, looked at from here, taken home by a storage."""
