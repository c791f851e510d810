"""The networks: a small CNN and the CIFAR ResNets, each with any attention."""
