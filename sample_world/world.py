"""The invented world that the sample data tells of: people, towns, things, and words for them.

Everything has a name in English and in Chinese. What holds in the world is drawn once from a seed
and never contradicted; how it is put into words is in english.py and chinese.py.
"""

import random
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    """Random draws that are the same on every platform and Python version.

    Only Random.random() is used: Python promises its sequence for a seed, but not that of
    shuffle, sample or choice. Each purpose has a sequence of its own.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._random = random.Random((seed << 32) + zlib.crc32(purpose.encode("utf-8")))
        self._decks: dict[Hashable, list] = {}

    def between(self, low: int, high: int) -> int:
        """Draw an integer, both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Draw True with the given probability."""
        return self._random.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """Draw one item."""
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in a drawn order (Fisher-Yates)."""
        deck = list(items)
        for last in range(len(deck) - 1, 0, -1):
            other = self.between(0, last)
            deck[last], deck[other] = deck[other], deck[last]
        return deck

    def turn(self, items: Sequence[Item], purpose: Hashable) -> Item:
        """Return the next of the items in a drawn order that is kept for this purpose.

        So all are used before any is used again.
        """
        deck = self._decks.setdefault(purpose, [])
        if not deck:
            deck += self.shuffled(items)
        return deck.pop()

    def addends(
        self, first: Sequence[int], second: Sequence[int], reserved: bool
    ) -> tuple[int, int]:
        """Draw two numbers to add, or to take away from their sum; see `is_reserved`."""
        while True:
            a, b = self.pick(first), self.pick(second)
            if is_reserved(a, b) == reserved:
                return a, b

    def together(self, numbers: Sequence[int], count: int, reserved: bool) -> list[int]:
        """Draw different numbers for one row; see `is_reserved`."""
        while True:
            drawn = self.shuffled(numbers)[:count]
            if is_reserved(*drawn) == reserved:
                return drawn


@dataclass(frozen=True)
class Word:
    """A word in both languages, with what a sentence about it needs besides.

    `measure` is the Chinese measure word, or for an instrument the verb of playing it; `plural` is
    English; `en_does` and `zh_does` tell what someone of a trade does.
    """

    en: str
    zh: str
    measure: str = ""
    plural: str = ""
    en_does: str = ""
    zh_does: str = ""


@dataclass(eq=False)
class Entity:
    """A person, a town or a thing: its name and what is true of it.

    A fact's value is a word, a year, or another entity. No training question is about a
    `held_out` one: what is known of it, a model can only have read in plain text.
    """

    kind: str
    name: Word
    facts: dict[str, "Word | int | Entity"] = field(default_factory=dict)
    female: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class World:
    """All entities of one seed."""

    people: list[Entity]
    towns: list[Entity]
    things: list[Entity]

    @property
    def entities(self) -> list[Entity]:
        """All of them."""
        return self.people + self.towns + self.things

    def values(self, kind: str, attribute: str) -> list["Word | int | Entity"]:
        """Every value that this attribute has for some entity of a kind."""
        facts = [e.facts[attribute] for e in self.entities if e.kind == kind]
        return list(dict.fromkeys(facts))


def is_reserved(*parts: object) -> bool:
    """Whether numbers or words are combined like this in the test alone, in whatever order."""
    key = " ".join(sorted(map(str, parts)))
    return zlib.crc32(key.encode("utf-8")) % 6 == 0


def lines(block: str) -> list[str]:
    """Split a block of templates into its lines; a backslash and an n break one."""
    return [line.strip().replace("\\n", "\n") for line in block.strip().splitlines()]


def words(table: str) -> list[Word]:
    """Read a table of words: entries divided by line ends or ';', their fields by '|'."""
    entries = table.replace("\n", ";").split(";")
    return [
        Word(*(part.strip() for part in entry.split("|"))) for entry in entries if entry.strip()
    ]


WOMEN = words("""
    Mira|米拉; Selwa|塞尔娃; Ilka|伊尔卡; Noreth|诺蕾丝; Tavia|塔薇娅; Brynna|布琳娜
    Odelle|奥黛尔; Yuneth|尤妮丝; Kesta|凯丝塔; Lirien|莉里恩
""")

MEN = words("""
    Tolven|托尔文; Orrin|奥林; Jorvan|约尔万; Kaelo|凯洛; Davor|达沃; Emrik|埃姆里克; Garran|加兰
    Halden|哈尔登; Ivo|伊沃; Lothan|洛坦
""")

TOWNS = words("""
    Graystone|灰石镇; Willowbay|柳湾; Ninebridge|九桥镇; Foxhollow|狐狸谷; Saltmarsh|盐泽镇
    Amberford|琥珀渡; Highmill|高磨镇; Cloudpass|云关; Redcliff|红崖镇; Lanternport|灯笼港
    Deepwell|深井镇; Pinecrest|松岭; Heronlake|鹭湖镇; Stonegate|石门镇; Windmoor|风原
    Oldharbor|老港; Snowfield|雪野; Maplegrove|枫林镇; Silverbrook|银溪镇; Thornwood|荆棘林
""")

RIVERS = words("""
    Ardle|阿德尔河; Vessa|维萨河; Torrin|托林河; Ouline|欧琳河; Brenka|布伦卡河; Kaldra|卡尔德拉河
    Elbin|埃尔宾河; Fyrrel|菲雷尔河; Gessen|格森河; Harrow|哈罗河; Isken|伊斯肯河; Junna|君娜河
    Lomma|洛马河; Merrow|梅罗河; Nivelle|尼韦尔河; Ostra|奥斯特拉河; Pallow|帕洛河; Quenna|昆纳河
    Rhosel|罗塞尔河; Sarrel|萨雷尔河; Tamble|坦布尔河; Urwen|乌雯河; Wyrra|威拉河; Zellan|泽兰河
""")

GOODS = words("""
    pottery|陶器; honey|蜂蜜; ribbons|丝带; paper lanterns|纸灯笼; ink|墨水; salt|盐
    blankets|毛毯; candles|蜡烛; glass beads|玻璃珠; tea|茶叶; cheese|奶酪; umbrellas|雨伞
    kites|风筝; wooden toys|木头玩具; soap|肥皂; knives|刀具; baskets|篮子; carpets|地毯
    hats|帽子; ropes|绳索; maps|地图; buttons|纽扣; mustard|芥末; vinegar|醋
""")

LANDMARKS = words("""
    clock tower|钟楼|座; lighthouse|灯塔|座; stone bridge|石桥|座; windmill|风车|架
    fountain|喷泉|座; library|图书馆|座; rose garden|玫瑰园|座; fish market|鱼市|个
    observatory|天文台|座; theater|剧院|座; watchtower|瞭望塔|座; castle|城堡|座; museum|博物馆|座
    bathhouse|澡堂|间; indoor market|室内市场|个; school|学校|所; oak tree|橡树|棵
    hospital|医院|所; maze|迷宫|座; train station|火车站|座; stone lion|石狮子|尊
    greenhouse|温室|间; sundial|日晷|座; inn|客栈|家
""")

JOBS = words("""
    baker|面包师|||bakes bread|烤面包; carpenter|木匠|||makes doors and tables|做门和桌子
    beekeeper|养蜂人|||looks after the hives|照看蜂箱; clockmaker|钟表匠|||mends clocks|修理钟表
    gardener|园丁|||waters the flowers|给花浇水; fisher|渔民|||casts the nets|撒网捕鱼
    doctor|医生|||treats the sick|给人看病; librarian|图书管理员|||lends out books|把书借给读者
    painter|画家|||paints pictures|画画; blacksmith|铁匠|||forges iron|打铁
    tailor|裁缝|||sews coats|缝制外套; potter|陶工|||shapes clay|用陶土做器皿
    shepherd|牧羊人|||minds the sheep|放羊; weaver|织工|||weaves cloth|织布
    sailor|水手|||sails the sea|出海航行; miller|磨坊主|||grinds grain|磨面粉
    printer|印刷工|||prints newspapers|印报纸; glassblower|吹玻璃工|||blows glass|吹制玻璃
    mapmaker|制图师|||draws maps|绘制地图; letter carrier|邮递员|||delivers letters|送信
    astronomer|天文学家|||watches the stars|观测星星; cook|厨师|||prepares meals|做饭
    shoemaker|鞋匠|||repairs boots|补靴子; locksmith|锁匠|||opens locks|开锁
""")

PETS = words("""
    cat|猫|只; dog|狗|条; rabbit|兔子|只; goat|山羊|只; parrot|鹦鹉|只; tortoise|乌龟|只
    duck|鸭子|只; goose|鹅|只; pony|小马|匹; fox|狐狸|只; owl|猫头鹰|只; hedgehog|刺猬|只
    squirrel|松鼠|只; raven|渡鸦|只; hamster|仓鼠|只; ferret|雪貂|只; donkey|毛驴|头
    peacock|孔雀|只; pigeon|鸽子|只; lamb|小羊羔|只; otter|水獭|只; frog|青蛙|只; canary|金丝雀|只
    lizard|蜥蜴|只
""")

INSTRUMENTS = words("""
    flute|长笛|吹; violin|小提琴|拉; drum|鼓|打; harp|竖琴|弹; guitar|吉他|弹; piano|钢琴|弹
    trumpet|小号|吹; cello|大提琴|拉; lute|鲁特琴|弹; accordion|手风琴|拉; oboe|双簧管|吹
    clarinet|单簧管|吹; horn|圆号|吹; banjo|班卓琴|弹; mandolin|曼陀林|弹; organ|管风琴|弹
    harmonica|口琴|吹; zither|齐特琴|弹; bagpipes|风笛|吹; xylophone|木琴|敲
""")

COLORS = words("""
    red|红色; blue|蓝色; green|绿色; yellow|黄色; white|白色; black|黑色; gray|灰色; purple|紫色
    orange|橙色; pink|粉色; brown|棕色; navy|藏青色; maroon|栗色; turquoise|绿松石色; ivory|象牙色
    lavender|薰衣草色; olive|橄榄色; coral|珊瑚色; beige|米黄色; lilac|丁香色
""")

DISHES = words("""
    plum soup|李子汤; onion pie|洋葱派; barley porridge|大麦粥; grilled trout|烤鳟鱼
    walnut bread|核桃面包; pumpkin stew|炖南瓜; noodle soup|汤面; bean salad|豆子沙拉
    cherry cake|樱桃蛋糕; mushroom rice|蘑菇饭; cabbage rolls|卷心菜卷; fried tofu|煎豆腐
    egg dumplings|蛋饺; potato pancakes|土豆饼; roast duck|烤鸭; lentil soup|扁豆汤; pear jam|梨酱
    sesame buns|芝麻包; corn bread|玉米面包; fish balls|鱼丸; ginger cookies|姜饼
    tomato noodles|番茄面; rice pudding|米布丁; carrot cake|胡萝卜蛋糕
""")

THINGS = words("""
    Kelda|凯尔达; Ombra|翁布拉; Sindle|辛德尔; Tarrow|塔罗; Velune|维卢内; Aquen|阿昆
    Brisk|布里斯; Cindor|辛多尔; Dunmar|邓马; Eldrin|埃尔德林; Falmo|法尔莫; Grindle|格林德
    Hollin|霍林; Ixel|伊克塞; Jasmur|贾斯穆; Korrin|科林; Lumet|卢梅; Mordal|莫达尔; Nimble|宁布尔
    Orvane|奥尔万
""")

KINDS = words("""
    clock|钟|座; bell|铃铛|个; lamp|灯|盏; sword|剑|把; ring|戒指|枚; mirror|镜子|面
    chair|椅子|把; box|匣子|个; cup|杯子|只; crown|王冠|顶; key|钥匙|把; globe|地球仪|个
    compass|罗盘|个; statue|雕像|尊; mask|面具|副; comb|梳子|把; vase|花瓶|只; table|桌子|张
    necklace|项链|条; bowl|碗|只; chessboard|棋盘|副; shield|盾牌|面; candlestick|烛台|座
    cane|手杖|根
""")

MATERIALS = words("""
    oak|橡木; pine|松木; walnut wood|胡桃木; cherry wood|樱桃木; cedar|雪松木; bamboo|竹子
    silver|白银; gold|黄金; copper|红铜; bronze|青铜; iron|铁; steel|钢; tin|锡; brass|黄铜
    jade|玉石; marble|大理石; granite|花岗岩; glass|玻璃; crystal|水晶; clay|陶土; porcelain|瓷
    bone|兽骨; amber|琥珀; ebony|乌木
""")

EVERYDAY = words("""
    water|水; fire|火; mountain|山; river|河; sea|海; sky|天空; sun|太阳; moon|月亮; star|星星
    rain|雨; snow|雪; wind|风; tree|树; flower|花; grass|草; bird|鸟; fish|鱼; horse|马; cow|奶牛
    sheep|绵羊; house|房子; room|房间; window|窗户; road|路; bridge|桥; boat|船; train|火车
    book|书; letter|信; paper|纸; bread|面包; rice|米饭; milk|牛奶; apple|苹果; egg|鸡蛋; sugar|糖
    morning|早晨; night|夜晚; day|白天; year|年; spring|春天; summer|夏天; autumn|秋天
    winter|冬天; friend|朋友; teacher|老师; child|孩子; mother|母亲; father|父亲; neighbor|邻居
    hand|手; head|头; eye|眼睛; heart|心; name|名字; question|问题; answer|答案; number|数字
    story|故事; song|歌
""")

# What training and tests ask about, and most of the text is about; the rest is there for stories.
ASKED = {
    "person": ("town", "job", "pet", "color", "friend"),
    "town": ("goods", "landmark"),
    "thing": ("material", "town"),
}
LARGER, SMALLER = range(10, 51), range(1, 10)  # what is added, or what remains and is taken away
NUMBERS = range(1, 10)  # what is sorted, compared and counted
ROW = 4  # numbers in a row to count in

# Small things to count, with their plurals.
COUNTABLE = words("""
    apple|苹果|个|apples; pear|梨|个|pears; egg|鸡蛋|个|eggs; book|书|本|books
    candle|蜡烛|根|candles; button|纽扣|颗|buttons; plum|李子|个|plums; lantern|灯笼|盏|lanterns
    stone|石子|颗|stones; feather|羽毛|根|feathers; hat|帽子|顶|hats; cup|杯子|只|cups
    bun|包子|个|buns; stamp|邮票|枚|stamps; spoon|勺子|把|spoons; key|钥匙|把|keys
    rose|玫瑰|朵|roses; shell|贝壳|枚|shells; walnut|核桃|颗|walnuts; lemon|柠檬|个|lemons
""")


def _vocabulary() -> list[Word]:
    """The words of the dictionary: no word twice, in neither language."""
    english, chinese = set(), set()
    entries = []
    for entry in EVERYDAY + COUNTABLE:
        if entry.en not in english and entry.zh not in chinese:
            english.add(entry.en)
            chinese.add(entry.zh)
            entries.append(entry)
    return entries


VOCABULARY = _vocabulary()


def build_world(seed: int) -> World:
    """Draw who lives where, does what and knows whom, and where every thing is and who made it."""
    dice = Dice(seed, "world")
    towns = [Entity("town", name) for name in TOWNS]
    people = [Entity("person", name, female=True) for name in WOMEN]
    people += [Entity("person", name) for name in MEN]
    things = [Entity("thing", name) for name in THINGS]

    def assign(entities: list[Entity], attribute: str, values: Sequence) -> None:
        """Give each entity a value of its own."""
        drawn = dice.shuffled(values)[: len(entities)]
        for entity, value in zip(entities, drawn, strict=True):
            entity.facts[attribute] = value

    assign(people, "town", towns)
    assign(people, "job", JOBS)
    assign(people, "pet", PETS)
    assign(people, "instrument", INSTRUMENTS)
    assign(people, "color", COLORS)
    assign(people, "dish", DISHES)
    assign(people, "year", range(1903, 2003, 2))  # no two of one age, nor one year apart
    pairs = dice.shuffled(people)
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        one.facts["friend"], other.facts["friend"] = other, one
    # Everyone writes to the next in a circle in which no two best friends stand side by side.
    circle = pairs[::2] + pairs[1::2]
    for one, other in zip(circle, circle[1:] + circle[:1], strict=True):
        one.facts["penpal"] = other

    assign(towns, "river", RIVERS)
    assign(towns, "goods", GOODS)
    assign(towns, "landmark", LANDMARKS)
    assign(towns, "year", range(1120, 1880, 7))

    assign(things, "kind", KINDS)
    assign(things, "material", MATERIALS)
    assign(things, "maker", people)
    assign(things, "town", towns)
    # Best friends together: a question about one would tell of the other.
    for entity in [*pairs[:6], *dice.shuffled(towns)[:5], *dice.shuffled(things)[:5]]:
        entity.held_out = True
    return World(people, towns, things)
