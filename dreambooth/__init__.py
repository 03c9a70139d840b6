"""DreamBooth in modules; dreambooth_implementation.py is made from them by `make single`."""
