"""The top floor: configurations, runs, comparisons and the command line, which alone see everything."""
