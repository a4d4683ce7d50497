"""The command `memcontrol train` as a script, for `accelerate launch training_scripts/train_memcontrol.py`."""

from memcontrol_hf.train import main

if __name__ == "__main__":
    main()
