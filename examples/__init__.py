"""Scripts to copy from: each trains one model padded and packed and says whether it is the same training."""
