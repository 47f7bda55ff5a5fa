"""Secrets that tests plant; each has the word PLANTED in it."""

PLANTED = "PLANTED"
PASSWORD, SIGNATURE, OPTION = "pw-PLANTED-1", "sig-PLANTED-2%2Bx", "option-PLANTED-3"
ENVIRONMENT, OF_REDIRECT, TOKEN = "environment-PLANTED-4", "redirect-PLANTED-5", "token-PLANTED-6"
