"""Train, evaluate and inspect CIFAR attention networks: python train.py fit --config configs/cbam_cnn.yaml"""

from cbam_pl.cli import main

if __name__ == "__main__":
    main()
