"""The words that conversations are made of. Each list is cut in two: what training may use, and what only
the evaluation uses (`held_out`)."""

VERBS = """read write list search get set create delete send update find open close start stop check count copy
move rename fetch build run print convert translate measure track book cancel order schedule compress archive
upload download publish validate format sort merge split lock unlock add remove show save load restart enable
disable assign approve reject invite describe compare scan""".split()
HELD_VERBS = "inspect repair water weigh paint summon launch rinse polish tune".split()

NOUNS = """file folder user ticket invoice stock message email event report image song route table branch commit
server container package document page note task alarm light door camera playlist product customer account payment
flight hotel recipe sensor device backup log key secret job queue cluster order price article contact meeting
reminder photo video channel database record session policy volume network process service window printer
robot truck parcel room seat contract budget game player team movie book lesson student course""".split()
HELD_NOUNS = """bicycle garden telescope kettle museum violin lantern harbor orchard compass windmill glacier
saddle beacon ledger""".split()

ADJECTIVES = """red blue green amber silent rapid northern southern early late small large secret public private
main second third final remote local daily weekly old new golden silver wooden iron bright dark cold warm quiet""".split()
HELD_ADJECTIVES = "crimson hollow western brave frozen velvet".split()

THINGS = """vault locker gate cabinet archive tower bridge cellar boat train garage office lab studio hangar
warehouse workshop library kitchen mailbox elevator tunnel antenna generator pump furnace engine safe""".split()
HELD_THINGS = "lighthouse greenhouse submarine attic caravan chapel".split()

CITIES = """Paris Rome Berlin Madrid Lisbon Vienna Prague Dublin Oslo Helsinki Athens Warsaw Tokyo Delhi Cairo
Lima Quito Boston Chicago Denver Dallas Toronto Sydney Nairobi Lagos Milan Lyon Hamburg Porto Seville Kyoto
Osaka Mumbai Istanbul Zurich Geneva London Brussels Amsterdam Copenhagen Stockholm Budapest Montreal Marseille""".split()
HELD_CITIES = "Naples Krakow Bergen Nantes Turin Havana Bordeaux Ankara Leipzig Malaga".split()

NAMES = """Anna Ben Clara David Emma Felix Grace Hugo Iris Jonas Karla Leo Maria Nora Oscar Paula Quentin Rosa
Simon Tina Ulrich Vera Walter Yara Alice Bob Carol Erin Frank Judy Mallory Peggy Trent Victor Lucas Julia""".split()
HELD_NAMES = "Zoe Boris Greta Ivan Selma Tariq Wanda Milo".split()

ANIMALS = "fox cat dog bear owl whale horse mouse turtle rabbit otter crow lion tiger wolf frog hen goat".split()

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Ireland": "Dublin", "Norway": "Oslo", "Finland": "Helsinki", "Greece": "Athens", "Poland": "Warsaw", "Japan": "Tokyo",
    "India": "Delhi", "Egypt": "Cairo", "Peru": "Lima", "Ecuador": "Quito", "Kenya": "Nairobi", "Belgium": "Brussels",
    "Denmark": "Copenhagen", "Sweden": "Stockholm", "Hungary": "Budapest", "England": "London",
}

FILLER = """the a one this that every some our their his her its weather meeting project morning evening river
mountain street market garden school train letter window coffee bread music story question answer number paper
color season summer winter road house kitchen table chair music light shadow water stone tree leaf bird cloud
rain snow wind sun moon star night day week month year hour minute friend neighbor teacher doctor engineer
painter writer farmer driver child people group team company office building floor door wall bridge boat ship
plane car bus bicycle ticket price money bank shop book page word sentence language code program function test
bug server machine network data table list map plan idea reason problem solution result change version release
walks runs opens closes reads writes likes sees finds keeps leaves brings takes gives makes needs wants knows
waits works moves turns grows falls starts stops slowly quickly often never always today yesterday tomorrow
here there again still already almost very quite small large old new good bad warm cold long short high low
in on under over near behind between with without from to of for and but because while when after before""".split()

SYLLABLES = """ba be bi bo bu da de di do du fa fe fi fo ga ge go gu ka ke ki ko ku la le li lo lu ma me mi mo mu
na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we wi xa za ze zi zo""".split()
ENDINGS = ["", "", "n", "r", "x", "s", "l", "m", "th", "ck", "nd"]

# words that no made-up name of training may be, and words of held-out phrases that arbitrary phrases of training leave out
RESERVED = {word.lower() for held in (HELD_VERBS, HELD_NOUNS, HELD_ADJECTIVES, HELD_THINGS, HELD_CITIES, HELD_NAMES) for word in held}
HELD_JOINTS = set("being whose could ahead like remember know mail store look calculate late umbrella listing called edit".split())
