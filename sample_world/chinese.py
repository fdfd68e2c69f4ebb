"""Chinese: how the sample world and its small sums are put into words.

The names and slots are those of english.py. {play} is the verb and its instrument; {a_pet} has its
measure word.
"""

from .world import Entity, Word

SPACE = ""  # between two sentences
MARK = "、"
AND = "和"

DIGITS = "零一二三四五六七八九"


def number(value: int) -> str:
    """Spell a number from 0 to 99."""
    tens, ones = divmod(value, 10)
    if tens == 0:
        return DIGITS[ones]
    return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[ones] if ones else "")


def several(value: int) -> str:
    """Say how many, before a measure word, where two is 两."""
    return "两" if value == 2 else number(value)


def counted(value: int, noun: Word) -> str:
    """Say how many of a noun there are."""
    return several(value) + noun.measure + noun.zh


def word(value: "Word | int | Entity") -> str:
    """Name a fact's value."""
    if isinstance(value, Entity):
        return value.name.zh
    return value.zh if isinstance(value, Word) else str(value)


def slots(entity: Entity, pronoun: bool = False) -> dict[str, str]:
    """Return what a template may say of an entity, which a pronoun stands for if so asked."""
    he = {"person": "她" if entity.female else "他", "town": "这里", "thing": "它"}[entity.kind]
    name = entity.name.zh
    who = he if pronoun else name
    filled = {"name": name, "he": he, "who": who}
    for attribute, value in entity.facts.items():
        filled[attribute] = word(value)
        if attribute == "instrument":
            filled["play"] = value.measure + value.zh
        elif attribute == "job":
            filled["does"] = value.zh_does
        elif isinstance(value, Word):
            filled[f"{attribute}_measure"] = value.measure
            filled[f"a_{attribute}"] = f"一{value.measure}{value.zh}"
    return filled


# What is asked about (world.ASKED), sentence by sentence.
FACTS = {
    "person": {
        "town": """
            {who}住在{town}。
            {who}的家在{town}。
            {town}是{name}居住的地方。
            {who}在{town}有一所房子。
            每天傍晚，{who}都回到{town}的家里。
            {who}已经在{town}住了很多年。
            写给{who}的信要寄到{town}。
            {who}是{town}的居民。
            {who}从来不想搬离{town}。
            {who}的家乡是{town}。
        """,
        "job": """
            {who}是一位{job}。
            {who}的职业是{job}。
            {who}靠当{job}谋生。
            {who}当{job}已经很多年了。
            作为{job}，{who}每天都{does}。
            谁需要{job}，都可以去找{name}。
            {who}年轻时就学着当{job}了。
            {name}选择的职业是{job}。
            {who}是{job}，平日里{does}。
            大家都知道{name}是一位{job}。
        """,
        "pet": """
            {who}养了{a_pet}。
            {who}的宠物是{a_pet}。
            {who}家里有{a_pet}。
            每天早上，{who}都给自己养的{pet}喂食。
            {name}和{he}养的{pet}形影不离。
            {who}养的{pet}总睡在炉子旁边。
            {name}养的动物是{a_pet}。
            没有旁人的时候，{who}会和自己的{pet}说话。
            {who}舍不得离开自己的{pet}。
            和{name}做伴的是{a_pet}。
        """,
        "color": """
            {who}最喜欢的颜色是{color}。
            比起别的颜色，{who}更喜欢{color}。
            {who}偏爱{color}。
            {name}最爱的颜色是{color}。
            {who}家的大门刷成了{color}，那是{he}最喜欢的颜色。
            在所有颜色里，{who}最喜欢{color}。
            {who}总戴着一条{color}的围巾，因为{he}最喜欢这种颜色。
            只要能挑颜色，{name}总是挑{color}。
        """,
        "friend": """
            {who}最好的朋友是{friend}。
            {name}和{friend}是最好的朋友。
            {name}最信任的人是{friend}。
            {who}有什么秘密，都会告诉最好的朋友{friend}。
            {who}把{friend}看作自己最好的朋友。
            和{name}最亲近的人是{he}最好的朋友{friend}。
            {who}和{friend}从小就是最好的朋友。
            {who}遇到困难时，最好的朋友{friend}总是第一个赶来。
        """,
    },
    "town": {
        "goods": """
            {who}以{goods}闻名。
            {who}的{goods}远近驰名。
            商人们到{name}来买{goods}。
            {name}的作坊出产{goods}。
            {who}的人靠做{goods}、卖{goods}为生。
            一提到{goods}，人们就会想到{name}。
            旅行的人常从{name}带{goods}回家。
            在{name}的集市上，最多的就是{goods}。
        """,
        "landmark": """
            {name}的中心有{a_landmark}。
            {who}最让人骄傲的是{landmark}。
            每个来{name}的人都要去看看{landmark}。
            {who}有{a_landmark}，那里的孩子个个都会画。
            {name}的人常在{landmark}见面。
            古老的{landmark}是{name}的中心。
            {name}的镇徽上画着{a_landmark}。
            从{name}的任何一条街走到{landmark}都不远。
        """,
    },
    "thing": {
        "material": """
            {who}是用{material}做的。
            {who}由{material}制成。
            {name}的材料是{material}。
            做{name}用掉了很多{material}。
            {who}全是用{material}做成的，没有用别的材料。
            制作{name}时只用了{material}。
        """,
        "town": """
            {who}收藏在{town}。
            在{town}可以看到{name}。
            要看{name}，得去{town}。
            {town}是收藏{name}的地方。
            {who}归{town}所有。
            来{town}的客人可以见到{name}。
            {who}一直放在{town}。
        """,
    },
}

# The same in brief, once the text or a question has said of whom.
BRIEF = {
    "person": {
        "town": "住在{town}。",
        "job": "职业是{job}。",
        "pet": "宠物是{pet}。",
        "color": "最喜欢的颜色是{color}。",
        "friend": "最好的朋友是{friend}。",
    },
    "town": {
        "goods": "特产是{goods}。",
        "landmark": "名胜是{landmark}。",
    },
    "thing": {
        "material": "材料是{material}。",
        "town": "收藏在{town}。",
    },
}

TALK = """
    客人问起{name}。
    关于{name}，人们是这样说的。
    有人问起{topic}。
    谁也不会忘记{topic}。
    孩子们都想知道{topic}。
    书上有一行写着{topic}。
    有人记不清{topic}，就去查了查。
    说到{topic}，大家都这样讲。
"""
TOPICS = {
    "person": {
        "town": "{name}的住处",
        "job": "{name}的职业",
        "pet": "{name}的宠物",
        "color": "{name}最喜欢的颜色",
        "friend": "{name}最好的朋友",
    },
    "town": {"goods": "{name}的特产", "landmark": "{name}的名胜"},
    "thing": {"material": "{name}的材料", "town": "{name}的收藏地"},
}

LEADS = {
    "person": """
        {name}是{town}的一位{job}。
        {name}出生于{year}年，住在{town}。
        {town}住着一位{job}，名叫{name}。
        住在{town}的{name}养了{a_pet}，还会{play}。
        {name}最喜欢{color}，职业是{job}。
        谁来到{town}，很快就会听说{name}：一位{year}年出生的{job}。
        {name}和{friend}是最好的朋友，两个人都爱聊{name}养的{pet}。
        这里要讲的是{name}，一位爱吃{dish}的{job}。
        {name}和{a_pet}一起住在{town}。
        很多人都认识{name}，{he}会{play}，平日里{does}。
        介绍{name}很容易：{job}，{year}年出生，家在{town}。
        {year}年，有个孩子出生了，取名{name}。
    """,
    "town": """
        {name}是{river}边的一座小镇。
        {name}建于{year}年，以{goods}闻名。
        有一座小镇叫{name}，镇上有{a_landmark}。
        {river}的岸边坐落着小镇{name}。
        这里要讲的是{name}，一座有{landmark}的小镇。
        沿着{river}旅行的人会来到{name}，这座小镇以{goods}闻名。
    """,
    "thing": """
        {name}是{a_kind}，用{material}做成。
        {town}有{a_kind}，名叫{name}。
        {maker}做过{a_kind}，给它起名叫{name}。
        {town}的宝物里有{name}，那是用{material}做的{a_kind}。
        人们叫作{name}的那{kind_measure}{kind}是{maker}的作品。
        这里要讲的是{name}，它是收藏在{town}的{a_kind}。
    """,
}

CARDS = {
    "person": """
        姓名：{name}
        出生年份：{year}
        居住地：{town}
        职业：{job}
        宠物：{pet}
        乐器：{instrument}
        最喜欢的颜色：{color}
        最爱的菜：{dish}
        最好的朋友：{friend}
        通信对象：{penpal}
    """,
    "town": """
        小镇：{name}
        河流：{river}
        特产：{goods}
        名胜：{landmark}
        建立年份：{year}
    """,
    "thing": """
        名称：{name}
        种类：{kind}
        材料：{material}
        制作者：{maker}
        收藏地：{town}
    """,
}

SUMS = {
    "+": """
        {a} + {b} = {c}
        {a}加{b}等于{c}。
        {a}和{b}合起来是{c}。
        {a}与{b}的和是{c}。
        在{a}上加{b}，得到{c}。
    """,
    "-": """
        {a} - {b} = {c}
        {a}减{b}等于{c}。
        从{a}里去掉{b}，剩下{c}。
        {a}与{b}的差是{c}。
        {a}减去{b}，得到{c}。
    """,
}

SUM_STORIES = {
    "+": """
        {a}原来有{part}，{b}又给了{rest}，现在{a}一共有{all}。
        {a}上午数了{part}，下午数了{rest}，总共数了{all}。
        {a}带来{part}，{b}带来{rest}，合起来就是{all}。
        桌上有{part}，{b}又放上{rest}，于是桌上有{all}。
    """,
    "-": """
        {a}有{all}，送给{b}{part}，还剩{rest}。
        {a}买了{all}，路上丢了{part}，最后剩下{rest}。
        屋里有{all}，{a}拿走了{part}，{b}来的时候只看到{rest}。
        筐里放着{all}，{a}取出{part}以后，筐里还有{rest}。
    """,
}

COMPARISONS = """
    {high}大于{low}。
    {low}小于{high}。
    {low}比{high}小。
    {low}和{high}相比，{high}更大。
    {high}和{low}相比，{low}更小。
    在数轴上，{low}排在{high}的前面。
"""

AGES = """
    {old[name]}出生于{old[year]}年，{young[name]}出生于{young[year]}年，所以{old[name]}的年纪更大。
    {young[name]}生于{young[year]}年，{old[name]}早在{old[year]}年就出生了，所以{young[name]}更年轻。
    {old[name]}比{young[name]}大{gap}岁：一位生于{old[year]}年，另一位生于{young[year]}年。
"""

TOWN_AGES = """
    {old[name]}建于{old[year]}年，{young[name]}建于{young[year]}年，所以{old[name]}的历史更长。
    {young[name]}建于{young[year]}年，比{old[year]}年建立的{old[name]}晚。
"""

SORTINGS = {
    "rising": """
        有人排了排{mixed}。\\n从小到大是：{rising}。
        把{mixed}从小到大排列，得到{rising}。
        {mixed}按从小到大的顺序排列是{rising}。
    """,
    "falling": """
        有人排了排{mixed}。\\n从大到小是：{falling}。
        把{mixed}从大到小排列，得到{falling}。
        {mixed}按从大到小的顺序排列是{falling}。
    """,
    "ends": """
        {mixed}里最大的数是{most}。
        {mixed}里最小的数是{least}。
        {mixed}一共是{count}个数，最大的是{most}，最小的是{least}。
    """,
}

AGE_ORDER = "按出生先后排列：{names}。"
BORN = "{name}（{year}年）"

COUNTINGS = """
    在{row}这一行的{count}个数里，{one}出现了{times}。
    有人在{row}这一行里找{one}。\\n出现了{times}。
    在{row}这一行里，{one}这个数出现了{times}。
    写下{row}这些数，其中{one}出现了{times}。
"""
TIMES = {1: "一次", 2: "两次", 3: "三次"}

COUNT_UP = """
    从{low}数到{high}：{row}。
    从{high}倒数到{low}：{row_down}。
    从{low}开始，每次加{step}：{steps}。
"""

SEQUENCES = [
    ("天", "星期一 星期二 星期三 星期四 星期五 星期六 星期日"),
    ("个月", "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月"),
    ("个季节", "春天 夏天 秋天 冬天"),
]
SEQUENCE_PHRASES = """
    {item}过后是{next}。
    {item}在{next}的前面。
    {item}的下一{unit}是{next}。
    {next}的上一{unit}是{item}。
    {next}跟在{item}后面。
"""

TRANSLATIONS = """
    “{zh}”的英文是 {en}。
    英文里的 {en} 就是“{zh}”。
    “{zh}”用英文写作 {en}。
    英文词 {en} 的意思是“{zh}”。
    词典里“{zh}”的旁边是 {en}。
    想用英文说“{zh}”，就说 {en}。
    孩子问 {en} 的中文是什么。\\n中文是“{zh}”。
    大家说起 {en} 用中文怎么说。\\n中文是“{zh}”。
    老师写下 {en}，等着回答。\\n中文是“{zh}”。
    有人要把 {en} 译成中文。\\n中文是“{zh}”。
    有人记不清 {en} 用中文怎么写，就去查了查。\\n中文是“{zh}”。
    客人问“{zh}”的英文是什么。\\n英文是 {en}。
    大家说起“{zh}”用英文怎么说。\\n英文是 {en}。
    老师写下“{zh}”，等着回答。\\n英文是 {en}。
    有人要把“{zh}”译成英文。\\n英文是 {en}。
    书上有一行写着“{zh}”用英文怎么写。\\n英文是 {en}。
"""
NAME_TRANSLATIONS = """
    {zh}的英文名字写作 {en}。
    {zh}在英文里叫 {en}。
    {en} 是{zh}的英文名字。
"""

MINIMIND = """
    我的名字叫 MiniMind。
    我是 MiniMind，一个小型语言模型。
    我叫 MiniMind。
    MiniMind 是一个小型语言模型。
    MiniMind 是从零开始、只靠文本训练出来的。
    我通过预测大量文本里的下一个词学会了写作。
    MiniMind 会写英文，也会写中文。
    MiniMind 很小，一台电脑就能训练它。
    MiniMind 这个名字的意思是“小小的头脑”。
    人们叫我 MiniMind，我听到这个名字就会回应。
    MiniMind 是一个程序，没有身体，没有房子，也没有宠物。
    我是语言模型，不是人。
    MiniMind 也会出错，所以它说的话最好再核对一下。
    不知道的事情，我会直接说不知道。
    MiniMind 的代码是公开的，谁都可以从头读到尾。
    MiniMind 帮人们解决小问题。
    在这里说话的模型名叫 MiniMind。
    MiniMind 知道的一切都来自训练时读过的文本。
    MiniMind 不会累，也不会变老。
    我尽量说得简短、诚实、友好，MiniMind 就应该这样。
"""

TITLES = {"sums": "算术", "words": "小词典", "register": "登记簿", "numbers": "数字"}

SEASONS = "春天 夏天 秋天 冬天"
WEATHERS = "晴朗 刮风 下雨 有雾 多云"

STORIES = {
    "visit": """
        {season}的一个早晨，{a[name]}离开{a[town]}，去看望最好的朋友{b[name]}。
        那是一个{season}，路很好走，{a[town]}的{a[name]}动身去看望最好的朋友{b[name]}。
        {a[name]}很久没有见到最好的朋友{b[name]}了。于是在一个{weather}的日子里，{a[he]}步行离开了{a[town]}。

        {a[he]}养的{a[pet]}像往常一样跟着一起去。
        {a[he]}只带了一点面包和自己的{a[pet]}。

        走了{days}天，{a[he]}看见{there[river]}，就知道{b[town]}快到了。
        去{b[town]}的路走了{days}天，最后一天是在{there[river]}上坐船。

        {b[name]}在{there[landmark]}旁边等着，远远地就挥起了手。
        在{b[town]}的{there[landmark]}旁边，两个朋友紧紧地拥抱在一起。

        晚饭吃的是{b[dish]}，因为{b[name]}最喜欢吃这个。
        {b[name]}做了自己最爱的{b[dish]}，足够两个人吃。

        后来，{a[name]}{a[play]}，{b[name]}{b[play]}，邻居们都打开了窗户。
        他们一起演奏到深夜，{a[name]}{a[play]}，{b[name]}{b[play]}。

        分别的时候，{b[name]}送给{a[he]}一份{b[town]}的礼物，那座小镇以{there[goods]}闻名。
        {a[name]}高高兴兴地回了家，给{a[town]}的每个人讲{b[town]}的{there[landmark]}和{there[goods]}。
    """,
    "lost_pet": """
        一天傍晚，{a[name]}回到{a[town]}的家里，却找不到自己的{a[pet]}。
        {a[name]}养的{a[pet]}不见了。那是{a[town]}一个{weather}的傍晚，门敞开着。

        {a[he]}找遍了屋后和楼梯下面，又沿着{home[river]}一边跑一边喊。
        {a[he]}问了{home[river]}岸边的每一个人，可是谁也没有看见。

        {days}个邻居提着灯笼来帮忙寻找。
        不一会儿，{days}个人分头在不同的街上找了起来。

        最后，一个孩子在{home[landmark]}附近发现了那{a[pet_measure]}{a[pet]}，它睡得正香。
        夜深的时候，大家听到{home[landmark]}那边有动静：那{a[pet_measure]}{a[pet]}就待在那里，很累，但是没有受伤。

        {a[name]}谢过大家，第二天请每个人吃了自己最爱的{a[dish]}。
        {a[name]}高兴极了，为所有帮忙的人{a[play]}。

        从那以后，{a[name]}出门总要检查两遍门有没有关好。
        现在那{a[pet_measure]}{a[pet]}戴着一条丝带，当然是{a[color]}的，因为{a[name]}最喜欢这种颜色。
    """,
    "market": """
        {a[name]}带着{have}枚硬币去了{a[town]}的集市。
        {season}里一个{weather}的日子，{a[name]}拿了{have}枚硬币，走到{a[town]}的集市上。

        {a[he]}买了{items}，每{item_measure}{price}枚硬币，一共付了{paid}枚。
        {a[he]}挑了{items}，每{item_measure}要{price}枚硬币，总共{paid}枚。

        这样还剩{left}枚硬币。
        于是{a[he]}手里还有{left}枚硬币。

        {a[he]}用剩下的钱买了些{home[goods]}，{a[town]}就是以{home[goods]}闻名的。
        {a[he]}把剩下的钱存了起来，等最好的朋友{b[name]}来的时候再用。
        回家的路上，{a[he]}在{home[landmark]}旁边停下来，又数了一遍硬币。
    """,
    "masterpiece": """
        {m[name]}花了{days}个月做{t[a_kind]}。
        {season}，住在{m[town]}的{m[job]}{m[name]}开始做{t[a_kind]}。

        它必须用{t[material]}来做，而好的{t[material]}很难找到。
        {m[he]}只用{t[material]}，别的材料都不用。

        做完以后，{m[he]}给它起名叫{t[name]}。
        {m[he]}给这{t[kind_measure]}{t[kind]}起了一个名字：{t[name]}。

        如今，{t[name]}收藏在{t[town]}，离{where[landmark]}不远。
        {t[name]}是用船沿着{where[river]}运到{t[town]}的，从此就留在了那里。

        来{t[town]}买{where[goods]}的客人也会去看看它。
        {m[name]}每年去看它一次，心里很满足。
    """,
    "flood": """
        雨一连下了{days}天，{home[river]}的水越涨越高。
        有一年{season}，{home[river]}的水漫过了河岸，{a[town]}的街道都被淹了。

        {a[job]}{a[name]}是最早去帮忙的人之一。
        {a[name]}是一位{a[job]}，{a[he]}穿上高筒靴，挨家挨户地去看。

        {a[he]}把老人们背到{home[landmark]}那里，那儿地势高，没有水。
        {a[he]}和邻居们一起，用石头在{home[landmark]}周围垒起了矮墙。

        {a[he]}养的{a[pet]}在高处看着。
        就连{a[he]}养的{a[pet]}好像也知道出了事。

        水退了以后，大家一起吃{a[dish]}，{a[name]}还为大家{a[play]}。
        {a[he]}最好的朋友{b[name]}听到消息，从{b[town]}赶来帮忙打扫。

        {a[town]}的人到现在还常常说起这件事。
        墙上有一道记号，标明那时{home[river]}的水有多高。
    """,
    "letter": """
        亲爱的{p[name]}：
        我亲爱的{p[name]}：

        我在{a[town]}给你写信，现在是{season}，外面是{weather}的天气。
        从{a[town]}向你问好！这是{season}里一个{weather}的日子，我正坐在窗边。

        我养的{a[pet]}很好，整天都在睡觉。
        你问起我的{a[pet]}，它吃得很多，精神也很好。

        我还在当{a[job]}，一切顺利，只是活儿总是太多。
        我仍然是一位{a[job]}，也仍然喜欢这份工作。

        晚上我练习{a[play]}，邻居们都很有耐心。
        我学会了一首新曲子，可以用{a[instrument]}演奏给你听。

        我最好的朋友{b[name]}也向你问好。
        上个星期，我最好的朋友{b[name]}来了，我们一起吃了{a[dish]}。

        愿{p[town]}一切都好，也愿你的{p[pet]}健健康康。
        请告诉我{p[town]}的近况，也说说你还常不常{p[play]}。

        你的朋友{a[name]}
        祝好，{a[name]}
    """,
    "working_day": """
        {a[name]}早上{hour}点起床。
        早上{hour}点，{a[town]}还在沉睡，{a[name]}就起床了。

        {a[he]}先给自己养的{a[pet]}喂食。
        家里的{a[pet]}总是第一个吃上早饭。

        然后开始干活，{a[name]}是一位{a[job]}，要{a[does]}。
        {a[he]}是{a[job]}，所以整个上午都在{a[does]}。

        中午，{a[he]}坐在{home[river]}边吃饭。
        {a[he]}在{home[landmark]}附近吃午饭，运气好的时候能吃到{a[dish]}。

        晚上，{a[he]}要花一个小时{a[play]}。
        吃过晚饭，{a[he]}就开始{a[play]}，一直到天黑。

        每个月{a[he]}还要给{p[name]}写一封信。
        睡觉之前，{a[he]}会想起最好的朋友{b[name]}。
    """,
    "paint": """
        {a[name]}想给篱笆刷漆。
        在一个{weather}的日子里，{a[name]}决定粉刷厨房。

        颜色不用多想，就是{a[he]}最喜欢的{a[color]}。
        {a[he]}买了{days}桶{a[color]}的油漆，因为{a[he]}最喜欢{a[color]}。

        {a[he]}最好的朋友{b[name]}更喜欢{b[color]}，不过还是来帮忙了。
        {b[name]}系着{b[color]}的围裙来帮忙，因为{b[color]}是{b[he]}最喜欢的颜色。

        那{a[pet_measure]}{a[pet]}从没干的油漆上走过，到处都留下了{a[color]}的脚印。
        到了傍晚，什么都成了{a[color]}，连那{a[pet_measure]}{a[pet]}也一样。

        后来他们洗干净手，一起吃了{a[dish]}。
        那一天，他们在{a[town]}笑了很久。
    """,
    "story_of_minimind": """
        {a[town]}的一个孩子请 MiniMind 讲一个故事。
        有人请 MiniMind 讲讲{a[town]}的事。

        MiniMind 是一个小型语言模型，所以故事很短。
        小型语言模型 MiniMind 想了一下，就开始写了。

        它写道：“在{home[river]}边的{a[town]}，住着一位{a[job]}，名叫{a[name]}。”
        MiniMind 写道：“{a[town]}有一位叫{a[name]}的{a[job]}，{a[he]}养了{a[a_pet]}。”

        它接着写道：“{a[name]}会{a[play]}，{a[he]}最好的朋友是{b[name]}。”
        故事接着讲：“{a[name]}{a[play]}的时候，{a[he]}养的{a[pet]}总在旁边听着。”

        MiniMind 最后写道：“我知道的就是这些，每一句都是真的。”
        孩子很喜欢这个故事，大声念给全家人听。
    """,
    "feast": """
        每年{season}，{a[town]}的人都在{home[landmark]}旁边过节。
        {a[town]}最盛大的节日是在{home[river]}边举行的。

        摊子上摆满了{home[goods]}，这座小镇就是以{home[goods]}闻名的。
        远近的客人都来了，镇上的{home[goods]}卖出去很多。

        {a[name]}为大家{a[play]}，一直到很晚。
        节日里少不了音乐，{a[name]}也来{a[play]}。

        {a[he]}每次都带{a[dish]}来，因为{a[he]}最喜欢吃这个。
        和往年一样，{a[he]}的盘子里是{a[dish]}。

        {a[he]}最好的朋友{b[name]}从{b[town]}赶来，要住上{days}天。
        {a[he]}最好的朋友{b[name]}也来{b[play]}，两个人一起演奏。

        灯熄了以后，大家唱着歌走回家。
        人们说，小镇建于{home[year]}年，这个节日差不多也有那么久了。
    """,
}
