"""Train the classifier whose features are used by the fd_<data> scores: python -m src.train_classifier data=digits"""

from src.tools.train_classifier import main

if __name__ == "__main__":
    main()
