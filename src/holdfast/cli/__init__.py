"""The `holdfast` command, one file per subcommand. May use every room; nothing may use it."""
