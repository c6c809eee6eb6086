"""Which way to render on some ranks takes how long and how much memory, and which is best."""
