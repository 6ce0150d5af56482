"""The top floor: configurations, runs, studies and the command line, which alone see everything."""
