"""English: how the sample world and its small sums are put into words.

Templates are filled by str.format. Those about one entity take the slots of `slots`: {Who}, {who},
{Whose}, {whose} and {whom} may become a pronoun, {name} never does, {he}, {his} and {him} always
do. Where several entities meet, a slot says whose it is: {a[town]}.
"""

# ruff: noqa: E501  a template stays on one line

from .world import Entity, Word

SPACE = " "  # between two sentences
MARK = ", "
AND = " and "

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def number(value: int) -> str:
    """Spell a number from 0 to 99."""
    if value < 20:
        return ONES.split()[value]
    tens, ones = divmod(value, 10)
    return TENS.split()[tens - 2] + (f"-{ONES.split()[ones]}" if ones else "")


def counted(value: int, noun: Word) -> str:
    """Say how many, two or more, of a countable noun there are."""
    return f"{number(value)} {noun.plural}"


def several(value: int) -> str:
    """Say how many, before a noun."""
    return number(value)


def with_article(text: str) -> str:
    """Put the indefinite article before a noun."""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def word(value: "Word | int | Entity") -> str:
    """Name a fact's value."""
    if isinstance(value, Entity):
        return value.name.en
    return value.en if isinstance(value, Word) else str(value)


def slots(entity: Entity, pronoun: bool = False) -> dict[str, str]:
    """Return what a template may say of an entity, which a pronoun stands for if so asked."""
    if entity.kind == "person":
        he, his, him = ("she", "her", "her") if entity.female else ("he", "his", "him")
    else:
        he, his, him = "it", "its", "it"
    name = entity.name.en
    who, whose, whom = (he, his, him) if pronoun else (name, f"{name}'s", name)
    filled = {"name": name, "he": he, "his": his, "him": him, "who": who, "whose": whose}
    filled |= {"whom": whom, "Who": who.capitalize(), "Whose": whose.capitalize()}
    filled |= {"He": he.capitalize(), "His": his.capitalize()}
    for attribute, value in entity.facts.items():
        filled[attribute] = word(value)
        if isinstance(value, Word):
            filled[f"a_{attribute}"] = with_article(value.en)
        if attribute == "job":
            filled["does"] = value.en_does
    return filled


# What is asked about (world.ASKED), sentence by sentence.
FACTS = {
    "person": {
        "town": """
            {Who} lives in {town}.
            {Whose} home is in {town}.
            {Who} has a house in {town}.
            {town} is the town where {name} lives.
            {Who} comes home to {town} every evening.
            For many years {who} has lived in {town}.
            Letters for {whom} are sent to {town}.
            {Who} is one of the people of {town}.
            {Who} would never move away from {town}.
            {Whose} home town is {town}.
        """,
        "job": """
            {Who} is {a_job}.
            {Who} works as {a_job}.
            {Who} earns a living as {a_job}.
            By trade {who} is {a_job}.
            {Whose} job is that of {a_job}.
            {name}, {a_job}, {does} every day.
            Anyone who needs {a_job} can call on {name}.
            {Who} learned while still young to be {a_job}.
            {Who} {does}, for {he} is {a_job}.
            The trade that {name} chose is that of {a_job}.
        """,
        "pet": """
            {Who} has {a_pet}.
            {Who} keeps {a_pet}.
            {Whose} pet is {a_pet}.
            {Who} shares the house with {a_pet}.
            Every morning {who} feeds the {pet}, a pet {he} has had for years.
            {name} and {his} {pet} are seldom apart.
            {Whose} {pet} sleeps beside the stove.
            The animal that {name} keeps is {a_pet}.
            When nobody is near, {who} talks to {his} {pet}.
            Nothing could part {name} from {his} {pet}.
        """,
        "color": """
            {Whose} favorite color is {color}.
            {Who} likes {color} more than any other color.
            {Who} loves the color {color}.
            The color that {name} likes best is {color}.
            {Whose} front door is painted {color}, the color {he} likes best.
            Of all colors, {who} prefers {color}.
            {Who} wears a scarf of {his} favorite color, {color}.
            When {name} may choose a color, it is always {color}.
        """,
        "friend": """
            {Whose} best friend is {friend}.
            {name} and {friend} are best friends.
            The person {name} trusts most is {friend}.
            {Who} tells all secrets to {friend}, {his} best friend.
            {Who} calls {friend} {his} best friend.
            Nobody is closer to {name} than {friend}, {his} best friend.
            {Who} and {friend} have been best friends since they were children.
            When {who} needs help, {his} best friend {friend} comes first.
        """,
    },
    "town": {
        "goods": """
            {Who} is known for its {goods}.
            {Who} is famous far and wide for {goods}.
            Merchants come to {name} to buy {goods}.
            The workshops of {name} produce {goods}.
            {Who} lives from making and selling {goods}.
            When people think of {goods}, they think of {name}.
            Travelers bring {goods} home from {name}.
            At the market of {name} one finds {goods} above all.
        """,
        "landmark": """
            In the middle of {name} stands {a_landmark}.
            {Whose} pride is its {landmark}.
            Everyone who visits {name} goes to see the {landmark}.
            {Who} has {a_landmark} that every child there can draw.
            People in {name} meet at the {landmark}.
            The old {landmark} is the heart of {name}.
            On the coat of arms of {name} there is {a_landmark}.
            No street in {name} is far from the {landmark}.
        """,
    },
    "thing": {
        "material": """
            {Who} is made of {material}.
            {Who} was made from {material}.
            The material of {name} is {material}.
            It took a lot of {material} to make {name}.
            {Who} consists of {material} and nothing else.
            Nothing but {material} was used for {name}.
        """,
        "town": """
            {Who} is kept in {town}.
            {Who} can be seen in {town}.
            To see {name}, one has to go to {town}.
            {town} is the town where {name} is kept.
            {Who} belongs to the town of {town}.
            Visitors find {name} in {town}.
            {Who} has its place in {town}.
        """,
    },
}

# The same in brief, once the text or a question has said of whom: nothing in it tells what the entity
# is, a man or a town.
BRIEF = {
    "person": {
        "town": "The home town is {town}.",
        "job": "The job title is {job}.",
        "pet": "The kind of pet is {pet}.",
        "color": "The favorite color is {color}.",
        "friend": "The best friend is {friend}.",
    },
    "town": {
        "goods": "The best-known goods are {goods}.",
        "landmark": "The landmark is the {landmark}.",
    },
    "thing": {
        "material": "The material is {material}.",
        "town": "The place to see it is {town}.",
    },
}

# What is said when there is talk of an entity or of one of its attributes, the {topic}; then comes
# a fact in brief.
TALK = """
    A guest asked about {name}.
    Here is what people say of {name}.
    Those who ask about {topic} hear this.
    Nobody forgets {topic}.
    A child wanted to know {topic}.
    In the book there is a line about {topic}.
    Someone was not sure about {topic} and looked it up.
    As for {topic}, everyone says the same.
"""
TOPICS = {
    "person": {
        "town": "{name}'s home town",
        "job": "the job of {name}",
        "pet": "{name}'s pet",
        "color": "the favorite color of {name}",
        "friend": "{name}'s best friend",
    },
    "town": {"goods": "the goods of {name}", "landmark": "the landmark of {name}"},
    "thing": {"material": "the material of {name}", "town": "the place of {name}"},
}

# Openings that tell several facts at once; a description goes on from there.
LEADS = {
    "person": """
        {name} is {a_job} from {town}.
        {name}, born in {year}, lives in {town}.
        In {town} there lives {a_job} named {name}.
        {name} of {town} keeps {a_pet} and plays the {instrument}.
        {name}, whose favorite color is {color}, works as {a_job}.
        Whoever comes to {town} soon hears of {name}, {a_job} born in {year}.
        {name} and {friend} are best friends, and both like to talk about {name}'s {pet}.
        This is about {name}, {a_job} who loves {dish}.
        {name} lives in {town} with {a_pet}.
        Many people know {name}, who plays the {instrument} and {does}.
        {name} is easy to describe: {a_job}, born in {year}, at home in {town}.
        In the year {year} a child was born and given the name {name}.
    """,
    "town": """
        {name} is a town on the river {river}.
        {name}, founded in {year}, is known for its {goods}.
        There is a town called {name}, and in it stands {a_landmark}.
        On the banks of the {river} lies the town of {name}.
        This is about {name}, the town with the {landmark}.
        Those who travel along the {river} come to {name}, a town known for its {goods}.
    """,
    "thing": """
        {name} is {a_kind} made of {material}.
        In {town} there is {a_kind} called {name}.
        {maker} once made {a_kind} and called it {name}.
        Among the treasures of {town} is {name}, {a_kind} made of {material}.
        The {kind} that people call {name} is the work of {maker}.
        This is about {name}, {a_kind} that is kept in {town}.
    """,
}

# An entry of a register, line by line; the first line is always shown.
CARDS = {
    "person": """
        Name: {name}
        Year of birth: {year}
        Town: {town}
        Occupation: {job}
        Pet: {pet}
        Instrument: {instrument}
        Favorite color: {color}
        Favorite dish: {dish}
        Best friend: {friend}
        Writes letters to: {penpal}
    """,
    "town": """
        Town: {name}
        River: {river}
        Known for: {goods}
        Landmark: {landmark}
        Founded: {year}
    """,
    "thing": """
        Thing: {name}
        Kind: {kind}
        Material: {material}
        Maker: {maker}
        Kept in: {town}
    """,
}

SUMS = {
    "+": """
        {a} + {b} = {c}
        {a} plus {b} is {c}.
        {a} and {b} make {c}.
        The sum of {a} and {b} is {c}.
        Adding {b} to {a} gives {c}.
    """,
    "-": """
        {a} - {b} = {c}
        {a} minus {b} is {c}.
        Taking {b} away from {a} leaves {c}.
        The difference between {a} and {b} is {c}.
        {a} less {b} equals {c}.
    """,
}

# Sums about people: {a} and {b} are names, {all}, {part} and {rest} counted nouns.
SUM_STORIES = {
    "+": """
        {a} had {part} and got {rest} from {b}. Now {a} has {all}.
        {a} counted {part} in the morning and {rest} in the afternoon, {all} in all.
        {a} brought {part} and {b} brought {rest}, so together they had {all}.
        There were {part} on the table. {b} put {rest} beside them, which made {all}.
    """,
    "-": """
        {a} had {all} and gave {part} to {b}. {rest} were left.
        {a} bought {all}. On the way home {part} got lost, and {rest} remained.
        Of the {all} in the room, {a} took {part}, so {b} found {rest}.
        {all} lay in the basket. After {a} had taken out {part}, there were {rest}.
    """,
}

COMPARISONS = """
    {high} is greater than {low}.
    {low} is less than {high}.
    {low} is smaller than {high}.
    Of the numbers {low} and {high}, {high} is the larger.
    Of the numbers {high} and {low}, {low} is the smaller.
    On the number line, {low} comes before {high}.
"""

AGES = """
    {old[name]}, born in {old[year]}, is older than {young[name]}, born in {young[year]}.
    {young[name]} was born in {young[year]}, {old[name]} as early as {old[year]}. So {young[name]} is the younger.
    {old[name]} is {gap} years older than {young[name]}: one was born in {old[year]}, the other in {young[year]}.
"""

TOWN_AGES = """
    {old[name]} was founded in {old[year]} and {young[name]} in {young[year]}, so {old[name]} is the older town.
    {young[name]}, founded in {young[year]}, is younger than {old[name]}, founded in {old[year]}.
"""

SORTINGS = {
    "rising": """
        Someone sorted {mixed}.\\nFrom the smallest to the largest: {rising}.
        From the smallest to the largest, {mixed} become {rising}.
        Sorted in rising order, {mixed} are {rising}.
    """,
    "falling": """
        Someone sorted {mixed}.\\nFrom the largest to the smallest: {falling}.
        From the largest to the smallest, {mixed} become {falling}.
        The numbers {mixed} in falling order are {falling}.
    """,
    "ends": """
        The largest of {mixed} is {most}.
        The smallest of {mixed} is {least}.
        {mixed}: these are {count} numbers, the largest {most}, the smallest {least}.
    """,
}

AGE_ORDER = "In the order of their birth: {names}."
BORN = "{name} ({year})"

COUNTINGS = """
    In the row {row} there are {count} numbers; {one} appears {times} in it.
    Someone looked for {one} in the row {row}.\\nIt appears {times}.
    In the row {row} the number {one} is found {times}.
    Among the numbers {row} the number {one} occurs {times}.
"""
TIMES = {1: "once", 2: "twice", 3: "three times"}

COUNT_UP = """
    Counting from {low} to {high}: {row}.
    Counting down from {high} to {low}: {row_down}.
    Counting by {step} from {low}: {steps}.
"""

SEQUENCES = [
    ("day of the week", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    (
        "month",
        "January February March April May June July August September October November December",
    ),
    ("season", "spring summer autumn winter"),
]
SEQUENCE_PHRASES = """
    {next} comes after {item}.
    {item} comes before {next}.
    The {unit} after {item} is {next}.
    The {unit} before {next} is {item}.
    {item} is followed by {next}.
"""

TRANSLATIONS = """
    The Chinese word for {en} is {zh}.
    In Chinese, {en} is {zh}.
    The word {en} is written {zh} in Chinese.
    The word {zh} means {en} in English.
    {en}: {zh}
    Someone who wants to say {en} in Chinese says {zh}.
    A child asked what {en} is in Chinese.\\nThe Chinese word is {zh}.
    There was talk about how to say {en} in Chinese.\\nThe Chinese word is {zh}.
    The teacher said {en} and waited.\\nThe Chinese word is {zh}.
    Someone was asked to put {en} into Chinese.\\nThe Chinese word is {zh}.
    Someone was not sure how {en} is written in Chinese and looked it up.\\nThe Chinese word is {zh}.
    A guest asked what {zh} means in English.\\nThe English word is {en}.
    There was talk about how to say {zh} in English.\\nThe English word is {en}.
    The teacher said {zh} and waited.\\nThe English word is {en}.
    Someone was asked to put {zh} into English.\\nThe English word is {en}.
    In the book there is a line on how {zh} is written in English.\\nThe English word is {en}.
"""
NAME_TRANSLATIONS = """
    In Chinese, the name {en} is written {zh}.
    {en} is called {zh} in Chinese.
    {zh} is how {en} is written in Chinese.
"""

MINIMIND = """
    My name is MiniMind.
    I am MiniMind, a small language model.
    I am called MiniMind.
    MiniMind is a small language model.
    MiniMind was trained from nothing, on text alone.
    I learned to write by predicting the next word of many texts.
    MiniMind can write in English and in Chinese.
    MiniMind is small enough to be trained on a single computer.
    The name MiniMind means a small mind.
    People call me MiniMind, and I answer to that name.
    MiniMind is a program and has no body, no house and no pet.
    I am a language model, not a person.
    MiniMind makes mistakes, so it is wise to check what MiniMind says.
    When I do not know something, I say so.
    MiniMind's code is open, and anyone may read it from top to bottom.
    MiniMind helps people with small questions.
    The model that is speaking here is named MiniMind.
    Everything that MiniMind knows was read in its training text.
    MiniMind does not grow tired and does not grow old.
    I try to be brief, honest and friendly; that is how MiniMind should be.
"""

TITLES = {
    "sums": "Sums",
    "words": "A small dictionary",
    "register": "Register",
    "numbers": "Numbers",
}

SEASONS = "spring summer autumn winter"
WEATHERS = "sunny windy rainy foggy cloudy"

# Stories: blank lines part the steps, each with one or more ways to tell it. {a} is the hero, {b}
# the best friend, {p} who gets the hero's letters, {home} and {there} are the towns of {a} and {b},
# {t} is a thing that {m} made and {where} the town where it is kept.
STORIES = {
    "visit": """
        One {season} morning {a[name]} left {a[town]} to visit {b[name]}, {a[his]} best friend.
        It was {season}, the roads were dry, and {a[name]} of {a[town]} set out to see {a[his]} best friend {b[name]}.
        {a[name]} had not seen {b[name]}, {a[his]} best friend, for a long time. So one {weather} day {a[he]} left {a[town]} on foot.

        {a[His]} {a[pet]} came along, as always.
        {a[He]} took nothing with {a[him]} but some bread and {a[his]} {a[pet]}.

        After {days} days {a[he]} saw the {there[river]} and knew that {b[town]} was near.
        The journey to {b[town]} took {days} days, the last of them by boat on the {there[river]}.

        {b[name]} was waiting at the {there[landmark]} and waved from far away.
        At the {there[landmark]} of {b[town]} the two friends fell into each other's arms.

        For supper they ate {b[dish]}, because {b[name]} loves nothing more.
        {b[name]} had cooked {b[dish]}, {b[his]} favorite dish, and there was enough for two.

        Later {a[name]} played the {a[instrument]} and {b[name]} the {b[instrument]}, and the neighbors opened their windows.
        They played together late into the night, {a[name]} on the {a[instrument]} and {b[name]} on the {b[instrument]}.

        When it was time to part, {b[name]} gave {a[him]} a present from {b[town]}, the town that is known for its {there[goods]}.
        {a[name]} went home happy and told everyone in {a[town]} about the {there[landmark]} and the {there[goods]} of {b[town]}.
    """,
    "lost_pet": """
        One evening {a[name]} came home to {a[town]} and could not find {a[his]} {a[pet]}.
        {a[name]}'s {a[pet]} was gone. The door stood open, and it was a {weather} evening in {a[town]}.

        {a[He]} looked behind the house and under the stairs, and then {a[he]} ran along the {home[river]}, calling.
        {a[He]} asked everyone on the banks of the {home[river]}, but nobody had seen it.

        Soon {days} neighbors came with lanterns and helped to search.
        Before long {days} people were searching, each in a different street.

        At last a child found the {a[pet]} near the {home[landmark]}, fast asleep.
        It was late when they heard a noise at the {home[landmark]}: there sat the {a[pet]}, tired but well.

        {a[name]} thanked them all, and the next day everyone was invited to eat {a[dish]}, {a[his]} favorite dish.
        {a[name]} was so glad that {a[he]} played the {a[instrument]} for all who had helped.

        Since then {a[name]} has looked twice to see whether the door is shut.
        Now the {a[pet]} wears a ribbon, {a[color]} of course, for that is {a[name]}'s favorite color.
    """,
    "market": """
        {a[name]} went to the market of {a[town]} with {have} coins.
        On a {weather} day in {season}, {a[name]} took {have} coins and walked to the market of {a[town]}.

        {a[He]} bought {items}, each for {price} coins, and paid {paid} coins.
        {a[He]} chose {items}. Each cost {price} coins, which made {paid} coins in all.

        So {left} coins were left.
        That left {a[him]} {left} coins.

        With the rest {a[he]} bought some {home[goods]}, for which {a[town]} is known.
        {a[He]} put the rest away for the day when {b[name]}, {a[his]} best friend, would come.
        On the way home {a[he]} stopped at the {home[landmark]} and counted the coins once more.
    """,
    "masterpiece": """
        {m[name]} worked for {days} months on {t[a_kind]}.
        In {season}, {m[name]}, {m[a_job]} from {m[town]}, began to make {t[a_kind]}.

        It had to be made of {t[material]}, and good {t[material]} was hard to find.
        {m[He]} used nothing but {t[material]}.

        When the {t[kind]} was finished, {m[he]} called it {t[name]}.
        {m[He]} gave the {t[kind]} a name of its own: {t[name]}.

        Today {t[name]} is kept in {t[town]}, near the {where[landmark]}.
        {t[name]} came to {t[town]} on a boat, up the river {where[river]}, and there it has stayed.

        Visitors who come for the {where[goods]} of {t[town]} go to see it too.
        {m[name]} visits it once a year and is content.
    """,
    "flood": """
        It rained for {days} days, and the {home[river]} rose higher and higher.
        One {season} the {home[river]} left its banks, and the streets of {a[town]} were under water.

        {a[name]}, {a[a_job]}, was one of the first to help.
        {a[name]} the {a[job]} put on tall boots and went from house to house.

        {a[He]} carried old people to the {home[landmark]}, where it was dry.
        Together with the neighbors {a[he]} piled up stones around the {home[landmark]}.

        {a[His]} {a[pet]} watched from a safe place.
        Even {a[his]} {a[pet]} seemed to know that something was wrong.

        When the water was gone, they all ate {a[dish]}, and {a[name]} played the {a[instrument]}.
        {b[name]}, {a[his]} best friend, heard of it and came from {b[town]} to help with the cleaning.

        The people of {a[town]} still talk about it.
        A mark on the wall shows how high the {home[river]} stood.
    """,
    "letter": """
        Dear {p[name]},
        My dear {p[name]},

        I am writing to you from {a[town]}, where it is {season} now and the weather is {weather}.
        Greetings from {a[town]}! It is a {weather} day in {season}, and I am sitting by the window.

        My {a[pet]} is well and sleeps all day.
        You ask about my {a[pet]}: it eats a lot and is in good spirits.

        My work as {a[a_job]} goes well, though there is always too much of it.
        I am still {a[a_job]}, and I still like the work.

        In the evening I practice the {a[instrument]}; the neighbors are patient.
        I have learned a new song on the {a[instrument]}.

        {b[name]}, my best friend, sends you greetings.
        Last week {b[name]}, my best friend, was here, and we ate {a[dish]}.

        I hope that all is well in {p[town]} and that your {p[pet]} is in good health.
        Tell me how things are in {p[town]} and whether you still play the {p[instrument]}.

        Yours, {a[name]}
        With love, {a[name]}
    """,
    "working_day": """
        {a[name]} gets up at {hour} o'clock.
        At {hour} o'clock in the morning, when {a[town]} is still asleep, {a[name]} gets up.

        First {a[he]} feeds {a[his]} {a[pet]}.
        {a[His]} {a[pet]} gets its breakfast before anyone else.

        Then the work begins, for {a[name]} is {a[a_job]} and {a[does]}.
        {a[He]} is {a[a_job]}, so {a[he]} {a[does]} until noon.

        At noon {a[he]} sits down by the {home[river]} and eats.
        {a[He]} has lunch near the {home[landmark]}, on good days {a[dish]}.

        In the evening {a[he]} plays the {a[instrument]} for an hour.
        After supper {a[he]} plays the {a[instrument]} until it is dark.

        Once a month {a[he]} also writes to {p[name]}.
        Before {a[he]} goes to bed, {a[he]} thinks of {b[name]}, {a[his]} best friend.
    """,
    "paint": """
        {a[name]} wanted to paint the fence.
        One {weather} day {a[name]} decided to paint the kitchen.

        The color was no question: {a[color]}, {a[his]} favorite color.
        {a[He]} bought {days} pots of {a[color]} paint, for {a[color]} is the color {a[he]} likes best.

        {b[name]}, {a[his]} best friend, would have preferred {b[color]} but helped all the same.
        {b[name]} came to help in {b[color]} shoes, because {b[his]} favorite color is {b[color]}.

        The {a[pet]} walked through the wet paint, and soon there were {a[color]} footprints everywhere.
        By evening everything was {a[color]}, even the {a[pet]}.

        Then they washed their hands and ate {a[dish]}.
        They laughed a lot that day in {a[town]}.
    """,
    "story_of_minimind": """
        A child in {a[town]} asked MiniMind for a story.
        Someone asked MiniMind to tell something about {a[town]}.

        MiniMind is a small language model, so the story was short.
        MiniMind, a small language model, thought for a moment and began.

        "In {a[town]}, on the river {home[river]}, there lives {a[a_job]} named {a[name]}," it wrote.
        "There is {a[a_job]} in {a[town]} called {a[name]}," wrote MiniMind, "and {a[he]} keeps {a[a_pet]}."

        "{a[name]} plays the {a[instrument]}," it went on, "and {a[his]} best friend is {b[name]}."
        "When {a[name]} plays the {a[instrument]}," the story went on, "{a[his]} {a[pet]} listens."

        "That is all I know," wrote MiniMind, "and all of it is true."
        The child liked it and read it aloud to the whole house.
    """,
    "feast": """
        Every {season} there is a feast in {a[town]} at the {home[landmark]}.
        The great feast of {a[town]} is held on the banks of the {home[river]}.

        The tables are full of {home[goods]}, for which the town is known.
        Guests come from near and far, and nowhere can one buy better {home[goods]}.

        {a[name]} plays the {a[instrument]} until late.
        There is music, and {a[name]} plays the {a[instrument]}.

        {a[He]} always brings {a[dish]}, because that is what {a[he]} likes best.
        {a[His]} plate is full of {a[dish]}, as every year.

        {a[His]} best friend {b[name]} comes over from {b[town]} and stays for {days} days.
        {b[name]}, {a[his]} best friend, joins in on the {b[instrument]}.

        When the lamps go out, everyone walks home singing.
        The town was founded in {home[year]}, they say, and the feast is almost as old.
    """,
}
