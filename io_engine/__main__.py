from io_engine.cli import main

main()
