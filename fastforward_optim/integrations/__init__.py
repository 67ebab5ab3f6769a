"""Fast Forward in training frameworks: each is an extra, imported where it is used."""
