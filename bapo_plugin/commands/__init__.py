"""What the subcommands of `bapo` do."""
