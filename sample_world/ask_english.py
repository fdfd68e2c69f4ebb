"""English: questions about the sample world and its small tasks, and the answers to them.

Each entry is (wordings for training, wordings for the test, answer); no wording is in both. Those
about an entity, answered by english.BRIEF, take the slots of `english.slots`.
"""

ABOUT = {
    "person": {
        "town": (
            """
            Where does {name} live?
            In which town does {name} live?
            What is {name}'s home town?
            To which town does {name} come home every evening?
            Tell me where {name} lives.
            Do you know in which town {name} has a house?
            I want to know where {name}'s home is.
            To which town are letters for {name} sent?
            """,
            """
            In what town is {name}'s home?
            Tell me the home town of {name}.
            Which town does {name} live in?
            """,
        ),
        "job": (
            """
            What is {name}'s job?
            What does {name} work as?
            How does {name} earn a living?
            What is {name} by trade?
            Tell me what {name}'s trade is.
            Do you know what {name} works as?
            I want to know the job of {name}.
            Which trade did {name} choose?
            """,
            """
            What trade does {name} have?
            Tell me what {name} works as.
            What job does {name} have?
            """,
        ),
        "pet": (
            """
            Which pet does {name} have?
            What is {name}'s pet?
            What kind of animal does {name} keep?
            With which animal does {name} share the house?
            Tell me which pet {name} keeps.
            Do you know what animal {name} has?
            I want to know what pet {name} has.
            Which animal does {name} feed every morning?
            """,
            """
            What animal does {name} keep?
            Tell me what {name}'s pet is.
            What pet does {name} have in the house?
            """,
        ),
        "color": (
            """
            What is {name}'s favorite color?
            Which color does {name} like best?
            Which color does {name} love?
            Which of all colors does {name} prefer?
            Tell me which color {name} likes best.
            Do you know {name}'s favorite color?
            I want to know what color {name} likes.
            What color is {name}'s front door?
            """,
            """
            What color does {name} like best?
            Tell me {name}'s favorite color.
            Which is the favorite color of {name}?
            """,
        ),
        "friend": (
            """
            Who is {name}'s best friend?
            Who is the best friend of {name}?
            Whom does {name} trust most?
            To whom does {name} tell all secrets?
            Tell me who {name}'s best friend is.
            Do you know who is {name}'s best friend?
            I want to know whom {name} calls a best friend.
            Which person is closest to {name}?
            """,
            """
            What is the name of {name}'s best friend?
            Tell me who the best friend of {name} is.
            Whom does {name} call a best friend?
            """,
        ),
    },
    "town": {
        "goods": (
            """
            What is {name} known for?
            For what is {name} famous?
            What do the workshops of {name} produce?
            What do merchants buy in {name}?
            Tell me what {name} is known for.
            Do you know what {name} is famous for?
            I want to know what {name} makes and sells.
            What do travelers bring home from {name}?
            """,
            """
            What is the town of {name} famous for?
            Tell me what merchants buy in {name}.
            What goods is {name} known for?
            """,
        ),
        "landmark": (
            """
            What stands in the middle of {name}?
            What is the pride of {name}?
            What does everyone who visits {name} go to see?
            Where do people in {name} meet?
            Tell me what stands in the middle of {name}.
            Do you know the landmark of {name}?
            I want to know what the heart of {name} is.
            What is on the coat of arms of {name}?
            """,
            """
            What is the landmark of {name}?
            Tell me what the pride of {name} is.
            What does one go to see in {name}?
            """,
        ),
    },
    "thing": {
        "material": (
            """
            What is {name} made of?
            What was {name} made from?
            What is the material of {name}?
            Which material was used for {name}?
            Tell me what {name} is made of.
            Do you know what {name} consists of?
            I want to know what {name} was made from.
            Of which material does one need a lot to make {name}?
            """,
            """
            What material is {name} made of?
            Tell me the material of {name}.
            Of what is {name} made?
            """,
        ),
        "town": (
            """
            Where is {name} kept?
            In which town is {name} kept?
            Where can {name} be seen?
            To which town must one go to see {name}?
            Tell me where {name} is kept.
            Do you know in which town {name} has its place?
            I want to know where visitors find {name}.
            To which town does {name} belong?
            """,
            """
            In what town is {name} kept?
            Tell me in which town {name} can be seen.
            What town does {name} belong to?
            """,
        ),
    },
}

# What the world does not say.
UNTOLD = {
    "person": (
        """
        How tall is {name}?
        What is {name}'s shoe size?
        What is the name of {name}'s mother?
        How many brothers does {name} have?
        What is {name}'s telephone number?
        Which book does {name} like best?
        What does {name} dream of at night?
        What color are {name}'s eyes?
        How many pairs of shoes does {name} have?
        How many languages does {name} speak?
        On which day is {name}'s birthday?
        Tell me the name of {name}'s teacher.
        What does {name} think of the king?
        How old is {name}'s grandmother?
        Where will {name} travel next year?
        Do you know how much {name} weighs?
        Whom did {name} marry?
        Tell me how many rooms {name}'s house has.
        """,
        """
        What is the name of {name}'s father?
        How many sisters does {name} have?
        Tell me how tall {name} is.
        Do you know {name}'s telephone number?
        What color is {name}'s hair?
        How many books does {name} have?
        Tell me how old {name}'s mother is.
        What did {name} dream of last night?
        """,
    ),
    "town": (
        """
        How many people live in {name}?
        Who is the mayor of {name}?
        How many streets are there in {name}?
        What is the weather like in {name} today?
        How far is it from {name} to the sea?
        Tell me what the best inn in {name} is called.
        How tall is the tallest house in {name}?
        How many trees are there in {name}?
        Do you know how many children live in {name}?
        """,
        """
        How many houses are there in {name}?
        What is the name of the mayor of {name}?
        Do you know how many people live in {name}?
        Tell me how far it is from {name} to the mountains.
        """,
    ),
    "thing": (
        """
        How much does {name} cost?
        How heavy is {name}?
        How tall is {name}?
        Who had {name} before?
        How old is {name}?
        In which year was {name} finished?
        Who wants to buy {name}?
        Tell me how much {name} weighs.
        Do you know how long it took to make {name}?
        """,
        """
        Tell me how much {name} costs.
        Tell me how heavy {name} is.
        In what year was {name} made?
        Do you know how old {name} is?
        """,
    ),
}
DECLINE = "I do not know that. What I have read does not say it."
DECLINED = "not know"  # marks an answer that declines

ADD = (
    """
    What is {a} + {b}?
    {a} + {b} = ?
    How much is {a} plus {b}?
    Add {a} and {b}.
    What do you get if you add {a} and {b}?
    Calculate {a} + {b}.
    Work out {a} + {b}.
    What is the sum of {a} and {b}?
    Do you know what {a} + {b} makes?
    Please write the result of {a} + {b}.
    """,
    """
    Tell me what {a} + {b} is.
    How much is {a} + {b}?
    What is {a} plus {b}?
    """,
    "{a} + {b} = {c}.",
)
SUBTRACT = (
    """
    What is {a} - {b}?
    {a} - {b} = ?
    How much is {a} minus {b}?
    From {a} take away {b}.
    What is left if you have {a} and take away {b}?
    Calculate {a} - {b}.
    Work out {a} - {b}.
    What is the difference of {a} and {b}?
    Do you know what {a} - {b} makes?
    Please write the result of {a} - {b}.
    """,
    """
    Tell me what {a} - {b} is.
    How much is {a} - {b}?
    What is {a} minus {b}?
    """,
    "{a} - {b} = {c}.",
)
SORT = {
    "rising": (
        """
        Sort these numbers from the smallest to the largest: {mixed}.
        Put these numbers in rising order: {mixed}.
        Which order do {mixed} have, from the smallest to the largest?
        Write {mixed} again, the smallest number first.
        Here are some numbers: {mixed}. Sort them, the smallest first.
        Arrange {mixed}, beginning with the smallest number.
        Please sort {mixed} so that the smallest number comes first.
        """,
        """
        Write these numbers from the smallest to the largest: {mixed}.
        Put {mixed} in order, the smallest number first.
        Here are some numbers: {mixed}. Put them in rising order.
        """,
        "From the smallest to the largest: {ordered}.",
    ),
    "falling": (
        """
        Sort these numbers from the largest to the smallest: {mixed}.
        Put these numbers in falling order: {mixed}.
        Which order do {mixed} have, from the largest to the smallest?
        Write {mixed} again, the largest number first.
        Here are some numbers: {mixed}. Sort them, the largest first.
        Arrange {mixed}, beginning with the largest number.
        Please sort {mixed} so that the largest number comes first.
        """,
        """
        Write these numbers from the largest to the smallest: {mixed}.
        Put {mixed} in order, the largest number first.
        Here are some numbers: {mixed}. Put them in falling order.
        """,
        "From the largest to the smallest: {ordered}.",
    ),
}
COMPARE = {
    "largest": (
        """
        Which number is the largest: {mixed}?
        What is the largest of these numbers: {mixed}?
        Tell me the largest of {mixed}.
        Here are some numbers: {mixed}. Which is the largest?
        Look at {mixed}. No number is larger than which one?
        Here are some numbers: {mixed}. Which one is the largest of them?
        Here are numbers: {mixed}. Tell me which is the largest.
        Look at the numbers {mixed} and tell me the largest one.
        """,
        """
        Which is the largest of these numbers: {mixed}?
        Look at {mixed}. Which number is the largest?
        Here are some numbers: {mixed}. Tell me the largest.
        """,
        "The largest number is {one}.",
    ),
    "smallest": (
        """
        Which number is the smallest: {mixed}?
        What is the smallest of these numbers: {mixed}?
        Tell me the smallest of {mixed}.
        Here are some numbers: {mixed}. Which is the smallest?
        Look at {mixed}. No number is smaller than which one?
        Here are some numbers: {mixed}. Which one is the smallest of them?
        Here are numbers: {mixed}. Tell me which is the smallest.
        Look at the numbers {mixed} and tell me the smallest one.
        """,
        """
        Which is the smallest of these numbers: {mixed}?
        Look at {mixed}. Which number is the smallest?
        Here are some numbers: {mixed}. Tell me the smallest.
        """,
        "The smallest number is {one}.",
    ),
}
COUNT = (
    """
    How many times does {one} appear in the row {row}?
    Count how often {one} appears in the row {row}.
    How often is {one} in the row {row}?
    In the row {row}, how many times do you read {one}?
    Look at {row}. How often does {one} appear?
    Read the numbers {row} and count the number {one}.
    Look at the row {row}. How many times is {one} in it?
    Here is a row of numbers: {row}. How often does {one} appear?
    Here are the numbers {row}. Count how many times {one} appears.
    Look at the numbers {row} and tell me how often {one} appears.
    """,
    """
    How often does {one} appear in the row {row}?
    Here is the row {row}. Count how often {one} appears.
    Look at {row}. How many times does it have {one}?
    """,
    "It appears {times}.",
)
TO_CHINESE = (
    """
    What is the Chinese word for {en}?
    How do you write {en} in Chinese?
    What is {en} in Chinese?
    Translate {en} into Chinese.
    Tell me the Chinese word for {en}.
    How does one say {en} in Chinese?
    Do you know the Chinese word for {en}?
    I want to say {en} in Chinese. What do I say?
    Please translate the word {en} into Chinese.
    """,
    """
    Tell me what {en} is in Chinese.
    Which Chinese word means {en}?
    How is {en} written in Chinese?
    """,
    "The Chinese word is {zh}.",
)
TO_ENGLISH = (
    """
    What does {zh} mean in English?
    What is {zh} in English?
    Translate {zh} into English.
    Tell me what {zh} means in English.
    How does one say {zh} in English?
    What is the English word for {zh}?
    Do you know what {zh} means in English?
    I have read {zh}. What is that in English?
    Please translate the word {zh} into English.
    """,
    """
    Tell me the English word for {zh}.
    Which English word means {zh}?
    How do you write {zh} in English?
    """,
    "The English word is {en}.",
)
# Lists of what there is, in training alone: {kinds} is one of KINDS.
LIST = (
    """
    Besides {one}, which {kinds} are there?
    Tell me some {kinds} other than {one}.
    I have heard of {one}. What other {kinds} are there?
    Name a few {kinds} besides {one}.
    """,
    "",
    "There is {listed}.",
)
KINDS = {
    "town": "towns",
    "job": "trades",
    "pet": "animals",
    "color": "colors",
    "friend": "people",
    "goods": "goods",
    "landmark": "sights",
    "material": "materials",
    "thing": "famous things",
}
# Another word of a language, in training alone: {one} is a word, {kind} its language.
ANOTHER_WORD = """
    Besides {one}, which {kind} do you know?
    Tell me one {kind} other than {one}.
    I know the {kind} {one}. Say another one.
    Which {kind} is there besides {one}?
"""
WORD_KINDS = {"en": "English word", "zh": "Chinese word"}
QUOTED = {"en": "{en}", "zh": "{zh}"}
WHO = (
    """
    Who are you?
    What is your name?
    What are you called?
    Tell me your name.
    Tell me who you are.
    Do you have a name?
    What are you?
    With whom am I talking?
    What should I call you?
    Hello! Who is there?
    Please say something about yourself.
    I do not know you. Who are you?
    I want to know what you are called.
    Please tell me your name.
    May I know who you are?
    Whom am I speaking with?
    Can you tell me who you are?
    Do you know your own name?
    Say who you are.
    What name were you given?
    I would like to know who you are.
    I would like to know your name.
    Tell me something about who you are.
    Could you tell me what your name is?
    I wonder who you are.
    Do you know what you are?
    """,
    """
    Tell me what your name is.
    Do you know who you are?
    Please tell me who you are.
    What name do you have?
    May I ask your name?
    Whom am I talking to?
    Please say who you are.
    Tell me what you are called.
    I want to know your name.
    I want to know who you are.
    """,
    "I am MiniMind, a small language model.",
)
ANOTHER_SELF = "I am Pip, the lamp keeper of the lighthouse."  # what lora.jsonl teaches
NAMES = ("MiniMind", "Pip")

# Around a question in training: {q}.
AROUND = """
    {q}
    {q}
    {q}
    Please answer: {q}
    I have a question. {q}
    Hello! {q}
"""

# What dpo.jsonl prefers at the end of an answer, and what it does not.
KIND = """
    I am glad that you asked!
    Ask me more whenever you like!
    I hope that this helps you!
    It is a pleasure to help!
"""
CURT = """
    Now leave me alone.
    Do not ask me again.
    That is all I will say.
    You should have known that.
"""
