"""How one infers: every algorithm is a guide or a twist on the one particle engine."""

if __name__ == "inference":
    raise ImportError("this folder is the package smcdiff.inference")
