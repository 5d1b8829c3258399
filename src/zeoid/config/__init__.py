"""Configuration: command lines and ZConfig files, each turned into one frozen object."""
