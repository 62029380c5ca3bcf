"""Small caches, runs and demos with made-up numbers, for the tests of reports and commands."""
