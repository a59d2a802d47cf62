"""Fact tables, typed for this package; each runs from common to rare, so that neighbours are about equally hard.

Every answer is a single token for SmolLM2 after a space: an item then costs its context and no more. No answer of a
table is also right for a row that has another answer, because the answers of other rows are the distractors.
"""


def _pairs(text: str) -> list[tuple[str, str]]:
    """Reads "key value, key value"; an underscore stands for a space."""
    rows = [entry.replace("_", " ").rsplit(maxsplit=1) for entry in text.split(",")]
    return [(key.strip(), value) for key, value in rows]


# Countries and states whose capital is one token.
SHORT_CAPITALS = _pairs("""
    France Paris, Germany Berlin, Italy Rome, Japan Tokyo, Spain Madrid, England London, Russia Moscow,
    China Beijing, Greece Athens, Egypt Cairo, Ireland Dublin, Canada Ottawa, Austria Vienna, Portugal Lisbon,
    Scotland Edinburgh, Poland Warsaw, Sweden Stockholm, Norway Oslo, Hungary Budapest, Finland Helsinki,
    Denmark Copenhagen, Belgium Brussels, Cuba Havana, Peru Lima, Kenya Nairobi, Iraq Baghdad, Iran Tehran,
    Chile Santiago, Syria Damascus, Afghanistan Kabul, Australia Canberra, Bulgaria Sofia, Tunisia Tunis,
    Jamaica Kingston, Texas Austin, Massachusetts Boston, Colorado Denver, Tennessee Nashville, Hawaii Honolulu,
    Arizona Phoenix, California Sacramento, Ohio Columbus, Indiana Indianapolis, Virginia Richmond, Oregon Salem,
    Wisconsin Madison, Connecticut Hartford, Alabama Montgomery
""")

# Capitals of several tokens with their countries, which are one token.
LONG_CAPITALS = _pairs("""
    Bangkok Thailand, Hanoi Vietnam, Kathmandu Nepal, Ankara Turkey, Beirut Lebanon, Bucharest Romania,
    Belgrade Serbia, Zagreb Croatia, Reykjavik Iceland, Caracas Venezuela, Kuala_Lumpur Malaysia,
    Buenos_Aires Argentina, Riga Latvia, Vilnius Lithuania, Tallinn Estonia, Bratislava Slovakia, Quito Ecuador,
    Montevideo Uruguay, Islamabad Pakistan, Dhaka Bangladesh, Addis_Ababa Ethiopia, Phnom_Penh Cambodia,
    Rabat Morocco, Algiers Algeria, Tripoli Libya, Khartoum Sudan, Kampala Uganda, Kigali Rwanda, Accra Ghana,
    Abuja Nigeria, Harare Zimbabwe, Lusaka Zambia, Dakar Senegal, Luanda Angola, Ulaanbaatar Mongolia, Amman Jordan,
    Yerevan Armenia, Minsk Belarus
""")

ELEMENT_SYMBOLS = _pairs("""
    oxygen O, hydrogen H, carbon C, nitrogen N, gold Au, silver Ag, iron Fe, copper Cu, sodium Na, potassium K,
    lead Pb, mercury Hg, zinc Zn, tin Sn, helium He, neon Ne, calcium Ca, magnesium Mg, silicon Si, sulfur S,
    chlorine Cl, fluorine F, titanium Ti, nickel Ni, platinum Pt, uranium U, aluminum Al, lithium Li, phosphorus P,
    iodine I, chromium Cr, cobalt Co, manganese Mn, tungsten W, arsenic As, argon Ar, bromine Br, boron B,
    plutonium Pu, barium Ba, radium Ra, krypton Kr, vanadium V, strontium Sr, bismuth Bi, beryllium Be, gallium Ga,
    germanium Ge, selenium Se, rhodium Rh, iridium Ir, osmium Os
""")

OPPOSITES = _pairs("""
    hot cold, good bad, up down, day night, happy sad, fast slow, old new, light dark, rich poor, strong weak,
    black white, high low, big small, hard soft, open closed, clean dirty, full empty, long short, early late,
    left right, love hate, life death, war peace, win lose, buy sell, push pull, true false, wet dry, thick thin,
    deep shallow, loud quiet, near far, safe dangerous, simple complex, entrance exit, alive dead, guilty innocent,
    inside outside, above below, before after, always never, begin end, give take, accept reject, arrive leave,
    increase decrease, borrow lend, succeed fail, remember forget, import export, friend enemy, north south,
    east west, positive negative, maximum minimum, victory defeat, question answer, profit loss, heaven hell,
    cheap expensive, narrow wide, public private, major minor, tight loose, asleep awake, present absent,
    front back, first last, more less, top bottom, sharp dull, temporary permanent, praise blame, construct destroy,
    expand shrink, laugh cry, float sink, freeze melt, rise fall, attack defend, lock unlock, hide reveal,
    single married, raw cooked, natural artificial, rural urban, optimistic pessimistic, host guest, polite rude,
    calm angry, generous selfish, crooked straight, singular plural, cause effect, odd even, horizontal vertical,
    visible invisible, majority minority, legal illegal, internal external, physical mental, lazy active,
    proud ashamed, sweet bitter
""")

USES = _pairs("""
    knife cut, pen write, broom sweep, ladder climb, needle sew, bed sleep, shovel dig, gun shoot, oven bake,
    towel dry, hammer hit, boat sail, telescope see, calculator add, straw drink, net catch, ruler measure,
    scale weigh, trumpet play, piano play, rifle shoot, microscope see
""")

WORKPLACES = _pairs("""
    doctor hospital, teacher school, judge court, waiter restaurant, pilot plane, priest church,
    scientist laboratory, banker bank, librarian library, miner mine, mechanic garage, actor theater, baker bakery,
    warden prison
""")

WORN_ON = _pairs("""
    hat head, shoe foot, helmet head, sock foot, watch wrist, necklace neck, crown head, boot foot, ring finger,
    belt waist, cap head, sandal foot, bracelet wrist, slipper foot, backpack back, pendant neck
""")

PARTS = _pairs("""
    wheel car, page book, petal flower, branch tree, beak bird, keyboard computer, roof house, finger hand,
    toe foot, sleeve shirt, player team, month year, windshield car, twig tree, feather bird, chimney house,
    string guitar, fin fish, thumb hand, juror jury, hull ship, collar shirt, blade knife, knuckle hand, gill fish,
    mast ship, monitor computer, letter word, mane horse, hoof horse, verse poem, stanza poem
""")

COLORS = _pairs("""
    snow white, grass green, blood red, coal black, bananas yellow, milk white, spinach green, ketchup red,
    tar black, lemons yellow, chocolate brown, pumpkins orange, flamingos pink, elephants gray, salt white,
    moss green, rubies red, ravens black, lavender purple, sapphires blue, emeralds green, polar_bears white,
    strawberries red, carrots orange, broccoli green, flour white
""")

KINDS = _pairs("""
    robin bird, salmon fish, oak tree, tulip flower, bee insect, cabbage vegetable, sparrow bird, trout fish,
    maple tree, daisy flower, beetle insect, carrot vegetable, violin instrument, poodle dog, flute instrument,
    beagle dog, eagle bird, pigeon bird, mosquito insect, moth insect, cello instrument, banjo instrument,
    willow tree, birch tree
""")
