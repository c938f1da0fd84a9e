from salmonn.cli.main import main as main
