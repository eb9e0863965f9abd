"""What decides: job specification, search, verification, service, exports, the command line."""
