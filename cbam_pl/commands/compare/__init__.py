"""Recipes with several seeds each: do they differ? python train.py compare --configs A B --seeds 0 1 --output DIR"""
