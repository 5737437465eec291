"""Measurements that a person can repeat: `difyops bench`."""
