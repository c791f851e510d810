"""Write a network for use elsewhere: python train.py export --format onnx | pt2 | safetensors --output DIR"""
