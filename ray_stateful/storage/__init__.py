"""Where checkpoints live: the protocol, its implementation over pyarrow, and DCP's writer and reader on top."""
