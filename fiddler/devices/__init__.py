"""Where experts run: the formula of an expert, its kernels, and one file a device."""
