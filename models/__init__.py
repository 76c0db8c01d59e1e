"""What one can sample from: processes, their schedules and networks."""

if __name__ == "models":
    raise ImportError("this folder is the package smcdiff.models")
