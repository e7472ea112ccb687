from bapo_plugin.cli import main

main()
