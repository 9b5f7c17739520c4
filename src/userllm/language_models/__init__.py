"""Where the language model comes from: the hub, a folder, a package wheel, or a tiny random one for tests."""
