"""Save a view of the curves, scores and samples in wandb: python -m src.wandb_workspace <run folder> --entity NAME"""

from src.tools.wandb_workspace import main

if __name__ == "__main__":
    main()
