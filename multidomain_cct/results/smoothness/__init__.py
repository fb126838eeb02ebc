"""The diagnosis: do features change where the classes do?"""
