"""Train the classifier whose features the fd_<data> scores use: python -m src.train_classifier data=digits"""

from src.tools.train_classifier import main

if __name__ == "__main__":
    main()
