"""The words of the recall facts. Each is one token with its leading space; the three lists are disjoint."""

KEYS = """ant ape bat bear bee boar bug calf cat clam cobra colt cow crab crane crow cub deer dodo dog dove duck eel elk emu
finch flea fly fox frog gnat goat goose gull hare hawk hen heron hound hyena ibex jay koala lamb lark lemur lion lizard
llama loon lynx mole moose moth mouse mule newt otter owl ox panda pike pony puma quail ram rat raven robin rook seal
shark shrew skunk sloth slug snail stork swan tick tiger toad trout tuna viper vole wasp whale wolf worm wren yak
zebra""".split()

FIRST = """red blue green pink gray black white brown gold silver amber copper iron tin brass bronze jade ruby pearl coral
ivory velvet silk wool linen paper glass stone wood clay wax salt sugar honey lemon mint plum peach cherry apple olive
maple oak pine cedar rose lily daisy tulip fern moss sand snow ice smoke storm cloud rain sun moon star""".split()

SECOND = """bell rope lamp ladder hammer drum flute harp horn pipe violin ring crown coat hat glove shoe boot belt scarf cape
mask cup bowl plate spoon fork knife kettle jar jug vase box chest basket bag sack key lock chain hook nail saw axe spade
rake plow wheel cart boat oar sail anchor ball doll coin stamp book pen brush map clock candle mirror chair table bed
quilt pillow rug broom bucket""".split()

assert len(set(KEYS + FIRST + SECOND)) == len(KEYS) + len(FIRST) + len(SECOND)
