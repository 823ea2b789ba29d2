"""Other systems on the same weights, one small file each; `bench.peers.known` has them by name."""
