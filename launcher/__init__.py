"""Entry points and job scripts: the only place where the rooms are wired together."""
