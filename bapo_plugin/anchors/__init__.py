"""Base responses made by the reference model, for rows that lack one."""
